"""The GhostVis network in plain PyTorch: decoder, vision tower, resampler, projector, preprocessing."""
