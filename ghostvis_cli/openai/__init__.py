"""The one reading and writing of OpenAI's bodies, for the local server, batches and the SGLang plug-in."""
