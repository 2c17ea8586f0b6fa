"""What a layer may do: configs, layouts and the moves between them, strategies, constraints.

Read `_config` first (which mesh axes split which dimension), then `_layout` (where the parts of a
tensor are), `_moves` (how they get elsewhere), `_exchange` (what that sends), `_strategy` (a config
for every layer; files of them, by `strategy.schema.json`), `_baselines` (such as data parallelism)
and `_constraints` (what the user forbids).
"""

from jaxlwp.space._baselines import BASELINES, baseline
from jaxlwp.space._config import DIMENSIONS, Config, Layout, dimension_order, enumerate_configs
from jaxlwp.space._constraints import Constraints, Split, outputs_kept
from jaxlwp.space._exchange import (
    COLLECTIVES,
    Collective,
    move_collectives,
    move_exchanges,
    wire_share,
)
from jaxlwp.space._layout import (
    Move,
    cdiv,
    copied_bytes,
    degree,
    even_layout,
    layout_axes,
    local_shape,
)
from jaxlwp.space._moves import plan_moves, plan_options
from jaxlwp.space._strategy import (
    Record,
    Strategy,
    made_here,
    make_strategy,
    read_config,
    strategy_schema,
)

__all__ = [
    "BASELINES",
    "COLLECTIVES",
    "Collective",
    "Config",
    "Constraints",
    "DIMENSIONS",
    "Layout",
    "Move",
    "Record",
    "Split",
    "Strategy",
    "baseline",
    "cdiv",
    "copied_bytes",
    "degree",
    "dimension_order",
    "enumerate_configs",
    "even_layout",
    "layout_axes",
    "local_shape",
    "made_here",
    "make_strategy",
    "move_collectives",
    "move_exchanges",
    "outputs_kept",
    "plan_moves",
    "plan_options",
    "read_config",
    "strategy_schema",
    "wire_share",
]
