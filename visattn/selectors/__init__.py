"""Dynamic patterns: rules by which blocks are chosen from the queries and keys of a call.

Each is a frozen dataclass with ``select(q, k, v, layout, scale)``, which gives a Selection.
``SELECTORS`` names them all; ``parse_pattern`` reads their written form.
"""

from visattn.patterns.parse import DYNAMIC
from visattn.selectors.agent import Agent
from visattn.selectors.clusters import ClusterBlocks
from visattn.selectors.core_context import CoreContext
from visattn.selectors.hashing import Hashing
from visattn.selectors.hierarchical import Hierarchical
from visattn.selectors.key_order import KeyOrder
from visattn.selectors.memory import Memory
from visattn.selectors.moba import MoBA
from visattn.selectors.online_choice import OnlineChoice
from visattn.selectors.pooled_family import (
    ASA,
    NABLA,
    PISA,
    VSA,
    DFSAttn,
    Draft,
    Jenga,
    XAttention,
)
from visattn.selectors.pyramid import Pyramid
from visattn.selectors.rectified import Rectified
from visattn.selectors.reuse import Reuse
from visattn.selectors.scores import register_gate
from visattn.selectors.selection import PooledRest, SampledRest, Selection
from visattn.selectors.selector import BlockSelector, Selector
from visattn.selectors.shared_heads import BiLevel, ProxyHeads
from visattn.selectors.skip_list import SkipList
from visattn.selectors.sparge import Sparge
from visattn.selectors.top_blocks import TopBlocks
from visattn.selectors.vmoba import VMoBA

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

SELECTORS: dict[str, type[Selector]] = {
    "top_blocks": TopBlocks,
    "jenga": Jenga,
    "draft": Draft,
    "dfsattn": DFSAttn,
    "nabla": NABLA,
    "vsa": VSA,
    "pisa": PISA,
    "asa": ASA,
    "xattention": XAttention,
    "sparge": Sparge,
    "rectified": Rectified,
    "moba": MoBA,
    "vmoba": VMoBA,
    "pyramid": Pyramid,
    "bi_level": BiLevel,
    "proxy_heads": ProxyHeads,
    "hierarchical": Hierarchical,
    "core_context": CoreContext,
    "key_order": KeyOrder,
    "cluster_blocks": ClusterBlocks,
    "online_choice": OnlineChoice,
    "hashing": Hashing,
    "skip_list": SkipList,
    "reuse": Reuse,
}
DYNAMIC.update(SELECTORS)
DYNAMIC["agent"] = Agent
