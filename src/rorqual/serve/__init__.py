"""A model behind the API that tools already speak, and a page to talk to it."""

from rorqual.extras import require

require("serve", "fastapi", "uvicorn", "prometheus_client")
