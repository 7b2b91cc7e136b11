"""The paper as commands: comparisons of quality and of cost, each a TOML that lists what to run."""
