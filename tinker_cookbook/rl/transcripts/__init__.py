"""The rollouts of a step as pages in the run directory: transcripts, their index, reports."""
