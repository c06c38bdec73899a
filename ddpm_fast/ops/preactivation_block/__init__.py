"""The residual block that has its norms before its convolutions (diffusers, OpenAI, EDM)."""
