"""The APIs that agents speak, without a server: requests and replies of each, as JSON objects.

A request of any dialect becomes the body of an OpenAI chat request, the one form that servers read.
A reply is a list of `Piece`s and an `Ending`; the writer of a dialect makes of them a whole answer,
or the events of a stream. The local service and the recording endpoint share these modules.
"""
