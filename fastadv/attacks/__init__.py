"""Attacks that measure robustness: APGD, FAB and Square, and AutoAttack, which runs them one after another."""
