"""Text blocks of the chat encoding. Data: servers read the constants and never run this file."""

TOOLS_SYSTEM_TEMPLATE = """## Tools

To call functions, end the reply with:

<{dsml_token}function_calls>
<{dsml_token}invoke name="FUNCTION">
<{dsml_token}parameter name="PARAMETER" string="true|false">VALUE</{dsml_token}parameter>
</{dsml_token}invoke>
</{dsml_token}function_calls>

Thoughts go between {thinking_start_token} and {thinking_end_token}.

<functions>
{tool_schemas}
</functions>
"""
response_format_template = """## Response Format:

Reply with JSON of this schema:
{schema}"""
