"""The one-machine stack: embedded servers, small models, a process supervisor.

Talks to the rest of Switchyard as processes and over HTTP, never by import.
"""
