"""A rendered page, as tags and texts."""

from html.parser import HTMLParser


class View(HTMLParser):
    """Tags of a view with their attributes, and its texts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(" ".join(data.split()))

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]
