"""Continuous batching: a queue of requests in front of one padded ragged batch."""

from realm_jax.engine.engine import Engine as Engine
from realm_jax.engine.metrics import Metrics as Metrics
from realm_jax.engine.request import Handle as Handle
from realm_jax.engine.request import Request as Request
from realm_jax.engine.stream import Stream as Stream
