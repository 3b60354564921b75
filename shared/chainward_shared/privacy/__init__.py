"""Differential privacy: what training costs, the ledger that remembers it, and the audit that recomputes it."""
