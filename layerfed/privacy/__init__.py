"""Differential privacy: a bound on what a run reveals of any one client's data.

`protection.py` clips a client's updates and statistics and adds noise to them; `account.py` counts ε for
each client. The server's part is `layerfed/server/private.py`, and the settings are
`layerfed/config/privacy.py`. docs/privacy.md says what ε means here and what it does not cover.
"""
