"""An endpoint whose address says which rollout a call belongs to: `/run/x/iter/3/traj/5/v1/...`."""
