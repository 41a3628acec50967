"""The cluster: what it is, and how to talk to Slurm and AWS."""
