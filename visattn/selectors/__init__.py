"""Dynamic patterns: rules that choose blocks from the queries and keys of a call.

Each is a frozen dataclass with ``select(q, k, v, layout, scale)``, which returns a Selection.
``SELECTORS`` names them all; ``parse_pattern`` reads their written form.
"""

import importlib
import pkgutil

from visattn.patterns.base.head_pattern import KindsOf
from visattn.selectors import methods

# isort: off
# The order of these imports is the order of SELECTORS, in lists and in the search.
from visattn.selectors.methods.top_k.top_blocks import TopBlocks
from visattn.selectors.methods.top_p.jenga import Jenga
from visattn.selectors.methods.top_k.draft import Draft
from visattn.selectors.methods.top_k.dfsattn import DFSAttn
from visattn.selectors.methods.top_p.nabla import NABLA
from visattn.selectors.methods.top_k.vsa import VSA
from visattn.selectors.methods.approximations.pisa import PISA
from visattn.selectors.methods.top_p.asa import ASA
from visattn.selectors.methods.top_p.xattention import XAttention
from visattn.selectors.methods.top_p.sparge import Sparge
from visattn.selectors.methods.approximations.rectified import Rectified
from visattn.selectors.methods.top_k.moba import MoBA
from visattn.selectors.methods.top_p.vmoba import VMoBA
from visattn.selectors.methods.approximations.pyramid import Pyramid
from visattn.selectors.methods.top_k.bi_level import BiLevel
from visattn.selectors.methods.top_p.proxy_heads import ProxyHeads
from visattn.selectors.methods.top_k.hierarchical import Hierarchical
from visattn.selectors.methods.approximations.core_context import CoreContext
from visattn.selectors.methods.per_head_blocks.key_order import KeyOrder
from visattn.selectors.methods.per_head_blocks.cluster_blocks import ClusterBlocks
from visattn.selectors.methods.per_head_blocks.online_choice import OnlineChoice
from visattn.selectors.methods.per_head_blocks.hashing import Hashing
from visattn.selectors.methods.across_steps.skip_list import SkipList
from visattn.selectors.methods.across_steps.reuse import Reuse
from visattn.selectors.methods.approximations.agent import Agent
# isort: on
from visattn.selectors.memory import Memory
from visattn.selectors.selector import BlockSelector, Selector
from visattn.selectors.stages.scores import register_gate
from visattn.selectors.stages.selection import PooledRest, SampledRest, Selection

__all__ = [
    "ASA",
    "NABLA",
    "PISA",
    "SELECTORS",
    "VSA",
    "Agent",
    "BiLevel",
    "BlockSelector",
    "ClusterBlocks",
    "CoreContext",
    "DFSAttn",
    "Draft",
    "Hashing",
    "Hierarchical",
    "Jenga",
    "KeyOrder",
    "Memory",
    "MoBA",
    "OnlineChoice",
    "PooledRest",
    "ProxyHeads",
    "Pyramid",
    "Rectified",
    "Reuse",
    "SampledRest",
    "Selection",
    "Selector",
    "SkipList",
    "Sparge",
    "TopBlocks",
    "VMoBA",
    "XAttention",
    "register_gate",
]

for _module in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}."):
    importlib.import_module(_module.name)  # a file without an import above is registered too

SELECTORS = KindsOf(Selector)  # type: ignore[type-abstract]
