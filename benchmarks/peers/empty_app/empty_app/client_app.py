"""A client that sends back what it was sent; with `model` it loads that first, as one that trains has to."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def answer(message: Message, context: Context) -> Message:
    model = str(context.run_config["model"])
    if model:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(model)
    return Message(content=message.content, reply_to=message)
