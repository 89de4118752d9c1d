"""The command line: one function a command, registered here.

Heavy imports stay inside the commands, so that `--help` and usage errors are immediate.
"""

import io
import sys

import typer

from rorqual.cli.eval_command import evaluate
from rorqual.cli.inference_commands import chat, generate, serve
from rorqual.cli.ledger_command import ledger
from rorqual.cli.model_commands import doctor, import_
from rorqual.cli.plan_command import plan
from rorqual.cli.quantize_command import quantize
from rorqual.cli.train_commands import distill, pretrain, r1, report, reward, rl, sft, speedrun
from rorqual.errors import Stopped, UserError, file_error
from rorqual.final_status import ended, final_status
from rorqual.process_tuning import tune
from rorqual.renamed import current_options

app = typer.Typer(
    help="Pre-train, RL-tune, evaluate and serve DeepSeek-style reasoning models on the hardware you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command, name in (
    (pretrain, "pretrain"), (sft, "sft"), (rl, "rl"), (distill, "distill"), (reward, "reward"), (r1, "r1"),
    (evaluate, "eval"), (generate, "generate"), (chat, "chat"), (serve, "serve"), (import_, "import"),
    (quantize, "quantize"), (doctor, "doctor"), (plan, "plan"), (ledger, "ledger"), (report, "report"),
    (speedrun, "speedrun"),
):  # fmt: skip
    app.command(name)(command)


def main() -> None:
    """Run the command line; a user error prints one sentence and exits with status 2."""
    tune()
    if ended():
        sys.exit(0)
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="replace")
    try:
        app(current_options(sys.argv[1:]))
    except UserError as e:
        print(f"rorqual: {e}", file=sys.stderr)
        sys.exit(2 if e.retry else final_status(2))
    except Stopped as e:
        print(f"rorqual: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        print(f"rorqual: {file_error(e.filename or 'a file', e, 'used')}", file=sys.stderr)
        sys.exit(2)
