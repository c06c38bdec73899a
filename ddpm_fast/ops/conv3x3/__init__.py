"""3×3 convolutions of stride 1, of one map or two side by side, upsampled or not."""
