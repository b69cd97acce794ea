"""The runtime: what nodes and executors report to while a run goes on."""

from framework.runtime.core import Runtime

__all__ = ["Runtime"]
