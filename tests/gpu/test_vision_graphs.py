"""The vision part's CUDA graphs: equal to the plain way, bit for bit. CUDA only."""

import pytest
import torch

from ghostvis_cli.model.config import TowerConfig, VisionConfig
from ghostvis_cli.model.vision import Vision
from ghostvis_cli.sglang.plugin.vision_graphs import VisionGraphs, attention_kernels, uploaded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SIZE, ROWS, WIDTH, LARGEST = 56, 8, 128, 5
CUDA = torch.device("cuda")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def compute(request: pytest.FixtureRequest) -> object:
    """Crops to rows, of a small vision part with random weights."""
    torch.manual_seed(0)
    tower = TowerConfig(
        family="clip", image_size=SIZE, patch_size=14, width=64, layers=3, heads=4, mlp_width=256
    )
    config = VisionConfig(
        tower=tower,
        num_tokens=ROWS,
        resampler_mode="perceiver",
        resampler_depth=2,
        resampler_heads=2,
        proj_hidden=64,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )
    vision = Vision(config, WIDTH).to(CUDA, request.param).eval()
    for parameter in vision.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

    @torch.no_grad()
    def rows(crops: torch.Tensor) -> torch.Tensor:
        with attention_kernels(CUDA):
            return vision(crops.permute(0, 3, 1, 2).float() / 255).to(request.param)

    return rows


def crops(count: int) -> torch.Tensor:
    images = torch.randint(0, 256, (count, 1, SIZE, SIZE, 3), dtype=torch.uint8)
    return uploaded([image.numpy() for image in images], CUDA)


def test_a_graphs_rows_are_those_of_the_plain_way_for_every_number_of_images(compute) -> None:
    graphs = VisionGraphs(compute, SIZE, LARGEST, CUDA)
    for _ in range(3):
        for count in (1, LARGEST, 2, 3, 4):
            images = crops(count)
            assert torch.equal(graphs.run(images), compute(images))


def test_rows_stay_as_they_are_when_other_images_follow(compute) -> None:
    graphs, images = VisionGraphs(compute, SIZE, LARGEST, CUDA), crops(2)
    rows = graphs.run(images)
    before = rows.clone()
    graphs.run(crops(2))
    assert torch.equal(rows, before)


def test_more_images_than_were_captured_have_no_graph(compute) -> None:
    graphs = VisionGraphs(compute, SIZE, LARGEST, CUDA)
    assert graphs.has(LARGEST) and not graphs.has(LARGEST + 1)
