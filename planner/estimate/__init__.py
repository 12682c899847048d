"""The estimate: closed formulas over a model's numbers, standard library only."""

from planner.estimate.peak import estimate

__all__ = ["estimate"]
