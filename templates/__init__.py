"""Files that are rendered or deployed: cluster descriptions, Slurm configuration, job scripts."""
