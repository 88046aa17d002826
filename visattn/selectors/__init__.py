"""Dynamic patterns: rules by which blocks are chosen from the queries and keys of a call.

Each is a frozen dataclass with ``select(q, k, v, layout, scale)``, which gives a Selection.
``SELECTORS`` names them all; ``parse_pattern`` reads their written form.
"""

from visattn.selectors.memory import Memory
from visattn.selectors.methods.across_steps.reuse import Reuse
from visattn.selectors.methods.across_steps.skip_list import SkipList
from visattn.selectors.methods.approximations.agent import Agent
from visattn.selectors.methods.approximations.core_context import CoreContext
from visattn.selectors.methods.approximations.pisa import PISA
from visattn.selectors.methods.approximations.pyramid import Pyramid
from visattn.selectors.methods.approximations.rectified import Rectified
from visattn.selectors.methods.per_head_blocks.cluster_blocks import ClusterBlocks
from visattn.selectors.methods.per_head_blocks.hashing import Hashing
from visattn.selectors.methods.per_head_blocks.key_order import KeyOrder
from visattn.selectors.methods.per_head_blocks.online_choice import OnlineChoice
from visattn.selectors.methods.top_k.bi_level import BiLevel
from visattn.selectors.methods.top_k.dfsattn import DFSAttn
from visattn.selectors.methods.top_k.draft import Draft
from visattn.selectors.methods.top_k.hierarchical import Hierarchical
from visattn.selectors.methods.top_k.moba import MoBA
from visattn.selectors.methods.top_k.top_blocks import TopBlocks
from visattn.selectors.methods.top_k.vsa import VSA
from visattn.selectors.methods.top_p.asa import ASA
from visattn.selectors.methods.top_p.jenga import Jenga
from visattn.selectors.methods.top_p.nabla import NABLA
from visattn.selectors.methods.top_p.proxy_heads import ProxyHeads
from visattn.selectors.methods.top_p.sparge import Sparge
from visattn.selectors.methods.top_p.vmoba import VMoBA
from visattn.selectors.methods.top_p.xattention import XAttention
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
