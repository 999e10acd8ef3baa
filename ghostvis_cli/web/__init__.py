"""`ghostvis chat --web`: the conversation of chat/ in a browser, on Gradio.

desk     what the page does to the conversation, without Gradio       view    how a conversation looks
page     Gradio's components and events                               server  who may come in, start and end
"""
