"""The page that shows runs: curves, settings, samples, rollouts, evaluations and times.

`answers` computes what the page asks for, `page` builds the page, and `server` serves both.
"""
