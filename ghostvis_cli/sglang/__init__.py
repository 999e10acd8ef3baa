"""What runs SGLang: its engine in a child process, its server, and the plug-in that SGLang itself imports."""
