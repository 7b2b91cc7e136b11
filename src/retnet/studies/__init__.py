"""Studies: the paper's comparisons of quality and cost as commands, each a TOML that lists what to run."""
