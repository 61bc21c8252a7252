"""Completion in bash, zsh and fish. click finds the words; the scripts and what passes between are ours.

click's own scripts put a space after ``optimizer.lr=``, and in bash they lose a word with ``=`` in it. Here a shell
sends the words before the cursor, quoted, and the word at the cursor. A line of the answer is ``plain`` or ``file``, a
value, and its help, between tabs. A shell takes a value as it is, so none is sent that would need quotes.
"""

import os
import shlex
from typing import Any, ClassVar

import click
from click.shell_completion import CompletionItem, ShellComplete, add_completion_class

BASH = """\
_tt_completion() {
    local kind value help line="${COMP_LINE:0:COMP_POINT}" word cut
    word="${line##*[[:space:]]}"
    cut="${word%"${word##*[=:]}"}"
    [[ $COMP_WORDBREAKS == *=* ]] || cut=""
    COMPREPLY=()
    while IFS=$'\\t' read -r kind value help; do
        if [[ $kind == file ]]; then
            compopt -o default
        else
            COMPREPLY+=("${value#"$cut"}")
        fi
    done < <(_TT_COMPLETE=bash_complete COMP_WORDS="${line%"$word"}" COMP_CWORD="$word" "$1" 2>/dev/null)
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
    return 0
}
complete -o nosort -F _tt_completion tt
"""

ZSH = """\
#compdef tt
_tt_completion() {
    local kind value help
    local -a keys words_found shown
    while IFS=$'\\t' read -r kind value help; do
        if [[ $kind == file ]]; then
            if [[ $PREFIX == *=* ]]; then compset -P '*='; fi
            _files
        elif [[ $value == *= ]]; then
            keys+=("$value")
        else
            words_found+=("$value")
            shown+=("${value}${help:+  -- $help}")
        fi
    done < <(_TT_COMPLETE=zsh_complete COMP_WORDS="${(j: :)${(@q)words[1,CURRENT-1]}} " COMP_CWORD="$PREFIX" \
        ${words[1]} 2>/dev/null)
    (( $#keys )) && compadd -V keys -S '' -a keys
    (( $#words_found )) && compadd -V words -l -d shown -a words_found
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _tt_completion "$@"
else
    (( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
    compdef _tt_completion tt
fi
"""

FISH = """\
function __tt_completion
    set -lx _TT_COMPLETE fish_complete
    set -lx COMP_WORDS (string join ' ' -- (string escape -- (commandline -opc)))' '
    set -lx COMP_CWORD (commandline -ct)
    tt 2>/dev/null | while read -l -d \\t kind value help
        switch $kind
            case file
                set -l key (string match -r '^[^=]*=' -- $COMP_CWORD)
                for path in (__fish_complete_path (string replace -r '^[^=]*=' '' -- $COMP_CWORD))
                    echo "$key$path"
                end
            case '*'
                printf '%s\\t%s\\n' $value $help
        end
    end
end
complete --command tt --no-files --arguments '(__tt_completion)'
"""


class _Completion(ShellComplete):
    def source(self) -> str:
        return self.source_template

    def get_completion_args(self) -> tuple[list[str], str]:
        words = os.environ.get("COMP_WORDS", "")
        try:
            before = shlex.split(words)
        except ValueError:  # a quote that is still open
            before = words.split()
        return before[1:], os.environ.get("COMP_CWORD", "").lstrip("\"'")

    def get_completions(self, args: list[str], incomplete: str) -> list["CompletionItem[Any]"]:
        try:
            return super().get_completions(args, incomplete)
        except click.ClickException:  # words before the cursor that are no command
            return []

    def format_completion(self, item: "CompletionItem[Any]") -> str:
        return "\t".join(("file" if item.type in ("file", "dir") else "plain", str(item.value), item.help or ""))

    def complete(self) -> str:
        args, incomplete = self.get_completion_args()
        found = self.get_completions(args, incomplete)
        words = [item for item in found if item.type != "plain" or shlex.quote(item.value) == item.value]
        return "\n".join(map(self.format_completion, words))


class _Bash(_Completion):
    name: ClassVar[str] = "bash"
    source_template: ClassVar[str] = BASH


class _Zsh(_Completion):
    name: ClassVar[str] = "zsh"
    source_template: ClassVar[str] = ZSH


class _Fish(_Completion):
    name: ClassVar[str] = "fish"
    source_template: ClassVar[str] = FISH


SCRIPTS = {shell.name: shell.source_template for shell in (_Bash, _Zsh, _Fish)}


def register() -> None:
    """Let click answer shells with these classes."""
    for shell in (_Bash, _Zsh, _Fish):
        add_completion_class(shell)
