"""The engine protocol's promises, asked of SGLang in a process of ours and of SGLang behind a server.

The tests are those of tests/engines/test_contract.py. The last of them closes its engine, so it runs last.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from ghostvis_cli.engines.base import Engine, complete
from ghostvis_cli.engines.remote import RemoteEngine, RemoteSettings
from ghostvis_cli.sglang.engine import SGLangEngine
from tests.conftest import Reference
from tests.engines import test_contract as contract
from tests.pictures import an_image
from tests.sglang.asking import directory
from tests.sglang.inprocess import profile_of
from tests.sglang.servers import serving

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("contract")]
ROWS = 8  # positions that an image takes in the recorded model
globals().update({name: test for name, test in vars(contract).items() if name.startswith("test_")})
engine, in_work = contract.engine, contract.in_work


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["sglang", "remote-sglang"])
async def started(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Engine, contract.InWork]]:
    model = directory(Reference("vlm_clip_hf").checkpoint(), tmp_path_factory.mktemp("model"))
    if request.param == "sglang":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            async with await SGLangEngine.start(profile_of(model)) as started:

                async def engine_in_work() -> bool:
                    return busy(await started.load())

                yield started, engine_in_work
        return
    with serving(model, "--constrained-json-disable-any-whitespace") as server:  # as `ghostvis serve` does

        async def server_in_work() -> bool:
            return busy((await asyncio.to_thread(server.send, "/v1/loads")).json["loads"][0])

        async with await RemoteEngine.connect(RemoteSettings(server.url, retries=0)) as connected:
            yield connected, server_in_work


def busy(load: dict[str, int]) -> bool:
    return load["num_running_reqs"] + load["num_waiting_reqs"] > 0


async def test_an_image_takes_the_tokens_that_info_says(engine: Engine) -> None:
    """A client of SGLang's routes is not told how many; then it is the model's own number."""
    images = (an_image("red"), an_image("blue"))
    done = await complete(engine, contract.ask("what is it", *images))
    assert done.usage.image_tokens == 2 * (engine.info.image_tokens or ROWS)
    assert engine.info.image_tokens == (0 if engine.info.kind == "remote" else ROWS)
