"""Differential privacy: what a run promises of any one client's data, and what that takes.

`settings.py` has the `[privacy]` section and what it does not go with; `protection.py` clips and noises
what a client sends, `private_mean.py` the server's sums; `account.py` counts ε, by client. What ε means
here, and what it does not cover, is in docs/privacy.md.
"""
