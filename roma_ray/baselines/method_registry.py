"""All methods by name, in the order of the table."""

from __future__ import annotations

from roma_ray.baselines.base_model import Base
from roma_ray.baselines.c3po import C3po, C3poKernel, C3poMode
from roma_ray.baselines.contract import Method
from roma_ray.baselines.dense_backprop import DenseBackprop
from roma_ray.baselines.expert_steering import ExpertSteering
from roma_ray.baselines.fragile_tokens import FragileTokens
from roma_ray.baselines.icl import InContext
from roma_ray.baselines.names import NAMES
from roma_ray.baselines.oracle import Oracle, OracleControl
from roma_ray.baselines.oracle_tuning import OracleTuning
from roma_ray.baselines.router_tuning import Roma, RouterTuning
from roma_ray.baselines.soft_prompts import PrefixTuning, PromptTuning

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Base(),
        InContext(),
        C3po(),
        C3poKernel(),
        C3poMode(),
        ExpertSteering(),
        RouterTuning(),
        OracleTuning(),
        PrefixTuning(),
        PromptTuning(),
        DenseBackprop(),
        FragileTokens(),
        Roma(),
        Oracle(),
        OracleControl(),
    )
}
assert tuple(METHODS) == NAMES, "names.py lists them without loading what they need"
