"""Reading what a model wrote: reasoning, text and tool calls, piece by piece.

One reader for both sides of the wire. The renderers and the local service's OpenAI endpoint feed it
with what they have, text and marks (tokens that structure a reply, or texts that stand for them),
and make their own messages of the pieces. So a reply means the same wherever it is read.

| module      | what it does                                                                  |
|-------------|-------------------------------------------------------------------------------|
| pieces      | what comes out: text, thought, calls, calls that cannot be read               |
| grammar     | which marks structure a reply                                                 |
| reader      | marks and text in, pieces out                                                 |
| scanner     | finds marks in text, for vocabularies that have no token for them             |
| loose       | all marks and notations at once, for readers that do not know the format      |
| labelled    | the reader of Gemma 4, whose reasoning has a label                            |
| harmony     | the reader of gpt-oss, whose replies are several messages                     |
| json_source | JSON to the letter: strict, and with the source of each member                |
| json_calls, tag_calls, pair_calls, mistral_calls | the notations of calls                   |
| schema      | the types that a tool declares for its arguments                              |

Nothing here knows tokenizers, messages or HTTP: the package imports the standard library alone.
What cannot be read for sure stays text, or comes back whole with the reason; it never becomes an
argument that nobody wrote.
"""
