"""Where and how often an experiment runs: ahead-of-time compilation, pods, launchers and sweeps."""
