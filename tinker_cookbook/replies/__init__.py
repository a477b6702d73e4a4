"""Reading what a model wrote: reasoning, text and tool calls, piece by piece.

The renderers and the local service's OpenAI endpoint share this reader. They feed it
with text and marks (tokens that structure a reply, or texts used as such), and build their own
messages from the pieces. So a reply has the same meaning wherever it is read.

| module      | what it does                                                                  |
|-------------|-------------------------------------------------------------------------------|
| pieces      | what comes out: text, thought, calls, calls that cannot be read               |
| grammar     | which marks structure a reply                                                 |
| reader      | marks and text in, pieces out                                                 |
| scanner     | finds marks in text, for vocabularies that have no token for them             |
| loose       | all marks and notations at once, for readers that do not know the format      |
| labelled    | the reader of Gemma 4, whose reasoning has a label                            |
| harmony     | the reader of gpt-oss, whose replies are several messages                     |
| json_source | exact JSON: strict loading, and the source text of each member                |
| json_calls, tag_calls, pair_calls, mistral_calls | the notations of calls                   |
| schema      | the types that a tool declares for its arguments                              |

Nothing here knows tokenizers, messages or HTTP: the package imports only the standard library.
What cannot be read with certainty stays text, or is returned whole with the reason. It never
becomes an argument that nobody wrote.
"""
