"""The fixtures of a tiny LLaVA."""

from zoo_fixtures import *  # noqa: F403
