"""Speed as ratios: this library beside named peers and physical limits, side by side in one process."""
