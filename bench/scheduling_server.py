"""`emoe serve` that also tells its cost model at /costs: what bench/scheduling.py starts.

python -m bench.scheduling_server MODEL-AND-OPTIONS-OF-EMOE-SERVE
"""

from __future__ import annotations

import sys
from typing import Any

PROGRAM = ("-m", "bench.scheduling_server")
"""For `emoe.bench.serve.local.Server`."""


def main() -> int:
    """Serve until told to stop."""
    from emoe import cli
    from emoe.server import app

    create_app = app.create_app

    def with_costs(engine: Any, *rest: Any) -> Any:
        made = create_app(engine, *rest)
        made.add_api_route("/costs", engine.costs.as_dict)
        return made

    app.create_app = with_costs  # type: ignore[assignment]
    return cli.main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
