"""A rank map in the terminal: its top modules, and a small heat map of layers × projections."""

from sidestep.events import Table
from sidestep.rank_map import RankMap

SHADES = " ░▒▓█"
SHORT = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
BLOCKS = {"self_attn": "self", "cross_attn": "cross", "mlp": "mlp"}


def place(name: str) -> tuple[int, str]:
    """(layer, column) of a module: `layers.3.self_attn.to_out.0` → (3, "self o")."""
    _, layer, block, projection = name.split(".", 3)
    return int(layer), f"{BLOCKS[block]} {SHORT[projection]}"


def grid(result: RankMap) -> tuple[list[str], dict[int, dict[str, str]]]:
    """Columns in order of the model, and for each layer the module's full name by column."""
    rows: dict[int, dict[str, str]] = {}
    for name in result.modules:
        layer, column = place(name)
        rows.setdefault(layer, {})[column] = name
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return columns, dict(sorted(rows.items()))


def top_modules(result: RankMap, count: int = 12) -> Table:
    """The modules with the most confirmed energy per parameter of one rank."""
    ordered = sorted(result.modules.items(), key=lambda item: item[1].score / item[1].cost, reverse=True)[:count]
    best = max(module.score / module.cost for _, module in ordered) or 1.0
    rows = tuple((name, str(m.rank), f"{100 * m.score / m.cost / best:.0f}", f"{m.confidence:.2f}") for name, m in ordered)
    return Table(title="Modules that respond most to this music", columns=("module", "rank", "score", "confidence"), rows=rows)


def heat_map(result: RankMap) -> Table:
    """Ranks of all modules, shaded by rank; a dot has no adapter."""
    columns, rows = grid(result)
    most = max(module.rank for module in result.modules.values())

    def cell(name: str | None) -> str:
        if name is None:
            return ""
        rank = result.modules[name].rank
        return f"{SHADES[min(len(SHADES) - 1, rank * len(SHADES) // (most + 1))]}{rank}" if rank else "·"

    body = tuple((str(layer), *(cell(row.get(column)) for column in columns)) for layer, row in rows.items())
    return Table(title="Rank of each projection, by layer", columns=("layer", *columns), rows=body)
