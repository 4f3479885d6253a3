"""The command `lightning-conv completion`: a script that completes commands, options and names in bash and zsh.

The script is text made from the same parsers as the help, so that pressing the tabulator key starts no Python, and printing it imports
neither torch nor Lightning. jsonargparse could make one by ``shtab``, from parsers that take seconds to build, for another dependency.
"""

import ast
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_conv.recipes.commands import COMMANDS, DATA, MODELS, RUNS, page
from lightning_conv.recipes.lab import EXPERIMENTS
from lightning_conv.recipes.named_configs import overlay_names, recipe_names, settings
from lightning_conv.recipes.usage import UsageParser

SHELLS = ("bash", "zsh")

SCRIPT = """\
_lightning_conv() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words= files=
    # bash splits --config=wide_fc at the equals sign; zsh does not.
    if [[ $word == = ]]; then word=; fi
    if [[ $before == = ]]; then before=${COMP_WORDS[COMP_CWORD-2]}; fi
    if (( COMP_CWORD == 1 )); then
        words="%(commands)s"
    else
        case $before in
            -c|--config) words="%(configs)s" files=1 ;;
            --model|--model.help) words="%(models)s" ;;
            --data|--data.help) words="%(data)s" ;;
            --ckpt_path|--checkpoint|--out|--output|--root) files=1 ;;
            *)
                case ${COMP_WORDS[1]} in
%(cases)s
                    *) files=1 ;;
                esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    if [[ -n $files ]]; then COMPREPLY+=($(compgen -f -- "$word")); fi
}
complete -o filenames -F _lightning_conv lightning-conv
"""

ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
"""What lets zsh read a script for bash."""


def completion(words: Sequence[str]) -> None:
    """Print the script for a shell.

    Args:
        words: words of the command line after `completion`: the name of the shell.

    Raises:
        UsageError: there is no script for this shell.
    """
    made = UsageParser(
        "completion",
        description="Print the script that completes commands, options, configurations and experiments.",
        epilog='examples:\n  eval "$(lightning-conv completion bash)"    # in ~/.bashrc\n'
        '  eval "$(lightning-conv completion zsh)"     # in ~/.zshrc\n',
    )
    made.add_argument("shell", choices=SHELLS)
    print(script(made.parse_args(list(words)).shell), end="")


def script(shell: str) -> str:
    """Return the script for a shell.

    Args:
        shell: one of ``SHELLS``.
    """
    options = {command: options_of(command) for command in COMMANDS}
    cases = "\n".join(
        f'                    {command}) words="{" ".join(each)}"{" files=1" if command == "report" else ""} ;;'
        for command, each in options.items()
        if each
    )
    names = {
        "commands": " ".join(COMMANDS),
        "configs": " ".join([*recipe_names(), *overlay_names()]),
        "models": " ".join(MODELS),
        "data": " ".join(DATA),
        "cases": cases,
    }
    return (ZSH if shell == "zsh" else "") + SCRIPT % names


def options_of(command: str) -> list[str]:
    """Return the words that can follow a command.

    Args:
        command: name of the command.
    """
    if command in (*RUNS, "check"):
        added = ["--module", "--ranks", "--device", "--json"] if command == "check" else []
        own = added + [
            option
            for option in page("fit" if added else command).options()
            if not option.endswith((".NAME", "-h", "-c"))
        ]
        sections = {"model": settings("model"), "data": settings("data"), "trainer": trainer_settings()}
        return own + [f"--{section}.{name}" for section, names in sections.items() for name in names]
    if command == "tables":
        from lightning_conv.recipes.paper_tables.command import parser as tables_parser

        return tables_parser().options()
    if command == "report":
        from lightning_conv.recipes.report_command import parser as report_parser

        return report_parser().options()
    return {"lab": [*sorted(EXPERIMENTS), "--out", "--help"], "completion": [*SHELLS]}.get(command, [])


def trainer_settings() -> list[str]:
    """Return the arguments of Lightning's ``Trainer``, read from its source, since importing it takes seconds.

    Returns:
        The names; none if the source is not where it is expected.
    """
    spec = find_spec("lightning")
    places = () if spec is None else spec.submodule_search_locations or ()
    for place in places:
        path = Path(place) / "pytorch" / "trainer" / "trainer.py"
        if path.is_file():
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name == "Trainer":
                    (init,) = [
                        each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"
                    ]
                    return [argument.arg for argument in init.args.kwonlyargs]
    return []
