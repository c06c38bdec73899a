"""3×3 convolutions of stride 2."""
