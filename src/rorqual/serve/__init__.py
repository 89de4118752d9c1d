"""An OpenAI-compatible server, with a chat page."""

from rorqual.extras import require

require("serve", "fastapi", "uvicorn", "prometheus_client")
