"""Parts of `experiments.compress`: methods and jobs, masks, channels, costs, results and pictures."""
