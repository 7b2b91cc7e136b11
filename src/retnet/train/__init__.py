"""Training: one configuration in, one run directory out, exactly resumable."""
