"""The hybrid loss of learned variance: squared error and variational bound, with the gradient in the same pass."""
