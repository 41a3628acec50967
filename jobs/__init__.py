"""Training jobs: their description, submission, life under preemption, and the diffusion trainer itself."""
