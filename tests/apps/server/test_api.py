"""The API over a tiny random model: OpenAI's client, the server's own routes, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from conftest_server import data_url, encoded, listening, picture

from blip2.inference import Blip2
