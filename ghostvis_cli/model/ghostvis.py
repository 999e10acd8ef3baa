"""The whole model: a decoder, and vision where the checkpoint has it."""

from torch import Tensor, nn

from ghostvis_cli.model.config import GhostVisConfig
from ghostvis_cli.model.decoder import Decoder
from ghostvis_cli.model.vision import Vision


class GhostVis(nn.Module):
    """A decoder, and for a vision model the part that turns images into its embeddings."""

    def __init__(self, config: GhostVisConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.vision = Vision(config.vision, config.decoder.n_embd) if config.vision else None

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalised pixels -> (B, N, D) rows that take the place of token embeddings."""
        assert self.vision is not None, "a text model has no vision part: callers check config.vision"
        return self.vision(pixels)
