"""The conversation: what people say, show and are answered, kept apart from whatever shows it.

session       turns with their own images; pure       store         sessions on disk
slash         the table of commands, parsing            commands      what each command does
conversation  session + engine + settings               surface       what commands need of a screen
context       whether a message fits                    script        without a terminal
export        Markdown, JSON, HTML                      repl, editor, render, preview: with one
"""
