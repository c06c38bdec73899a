"""A network's first convolution: a large odd kernel on few channels."""
