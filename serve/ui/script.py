"""What the page does in the browser by itself: keys, conversations that stay there, files to save. Asks no server."""

from __future__ import annotations

_CONVERSATIONS_KEPT = 50
_STORAGE_KEY = "adapterhub.conversations.1"

HEAD = (
    f'<script>const CONVERSATIONS_KEPT = {_CONVERSATIONS_KEPT}, STORAGE_KEY = "{_STORAGE_KEY}";</script>'
    """
<script>
addEventListener("keydown", (event) => {
    const stop = [...document.querySelectorAll("button.stop")].find((button) => button.offsetParent);
    if (event.key === "Escape" && stop) {
        stop.click();
    } else if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        document.querySelector("#picker input")?.focus();
    } else if (event.key === "Enter" && !event.shiftKey && stop && event.target.closest?.("#box")) {
        // One answer at a time: the text waits in the box.
        event.preventDefault();
        event.stopImmediatePropagation();
    }
}, true);
addEventListener("click", (event) => {
    // A flag with one choice needs no menu.
    const flag = event.target.closest?.(".extra-feedback > button");
    flag?.parentElement.querySelector(".extra-feedback-option")?.click();
    polishSoon();
});
// What Gradio leaves without a name, or as a button within a button.
const polish = () => {
    document.querySelectorAll(".thought-group .arrow button:not([inert])").forEach((one) => { one.inert = true; });
    document.querySelectorAll('.extra-feedback > button[aria-label="Feedback"]').forEach((one) => {
        one.ariaLabel = one.title = "Say what it should have said";
    });
    document.querySelectorAll(".said:not([aria-live])").forEach((one) => one.setAttribute("aria-live", "polite"));
    document.querySelectorAll("button.label-wrap").forEach((one) => {
        one.querySelectorAll(".icon").forEach((icon) => { icon.ariaHidden = "true"; });
        const inside = one.parentElement.querySelector('[data-testid="accordion-content"]');
        one.ariaExpanded = String(inside?.style.display !== "none");
    });
};
let polishing = false;
const polishSoon = () => {
    if (polishing) return;
    polishing = true;
    requestAnimationFrame(() => { polishing = false; polish(); });
};
new MutationObserver(polishSoon).observe(document, { subtree: true, childList: true });
window.adapterhub = {
    text: (message) => typeof message.content === "string"
        ? message.content : message.content.map((block) => block.text ?? "").join(""),
    isNote: (message) => Boolean(message.metadata?.title),
    // Read anew each time: another tab may have written.
    kept: () => {
        try { return JSON.parse(localStorage.getItem(STORAGE_KEY)) ?? []; } catch { return []; }
    },
    keep: (all) => {
        for (let kept = all.slice(0, CONVERSATIONS_KEPT); ; kept = kept.slice(0, -1)) {
            try { localStorage.setItem(STORAGE_KEY, JSON.stringify(kept)); return kept; }
            catch (full) { if (kept.length < 2) return kept; }  // the oldest go first
        }
    },
    choices: (kept) => kept.map((one) => [one.title, one.id]),
    save: (name, type, text) => {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([text], { type }));
        link.download = name;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    },
    fileName: (title) => (title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "chat").slice(0, 50),
    title: (chat) => {
        const first = chat.find((message) => message.role === "user");
        const text = first ? adapterhub.text(first).trim().replace(/\\s+/g, " ") : "";
        return text.length > 48 ? text.slice(0, 47) + "…" : text || "Conversation";
    },
    // The turns, and who gave each answer: a note follows the answer it is about.
    turns: (chat) => chat.map((message, at) => ({ message, by: chat[at + 1]?.metadata?.id }))
        .filter(({ message }) => !adapterhub.isNote(message))
        .map(({ message, by }) => {
            const cut = by && message.role === "assistant" ? by.lastIndexOf("@") : -1;
            const turn = { role: message.role, content: adapterhub.text(message) };
            return cut < 0 ? { turn } : { turn, model: by.slice(0, cut), digest: by.slice(cut + 1) };
        }),
};
</script>
"""
)

KEEP = """(id, chat) => {
    if (!chat?.length) return { __type__: "update" };
    const now = { id: id ?? Date.now().toString(36), title: adapterhub.title(chat), messages: chat };
    const all = adapterhub.keep([now, ...adapterhub.kept().filter((one) => one.id !== now.id)]);
    return { __type__: "update", choices: adapterhub.choices(all), value: now.id };
}"""
"""inputs: the current conversation's id, its messages; output: the list of them"""

LIST = '() => ({ __type__: "update", choices: adapterhub.choices(adapterhub.kept()) })'

OPEN = "(id) => [id, adapterhub.kept().find((one) => one.id === id)?.messages ?? []]"
NOTHING = "() => [null, []]"
"""input: a conversation's id; both give the id and the messages of the one to turn to"""

FORGET = """(id) => {
    const all = adapterhub.keep(adapterhub.kept().filter((one) => one.id !== id));
    return { __type__: "update", choices: adapterhub.choices(all), value: null };
}"""

EXPORT_JSON = """(chat, system) => {
    const turns = adapterhub.turns(chat ?? []);
    if (!turns.length) return;
    const said = system?.trim() ? [{ role: "system", content: system.trim() }] : [];
    const messages = [...said, ...turns.map(({ turn }) => turn)];
    const answered_by = turns.flatMap(({ model, digest }, at) =>
        model ? [{ message: at + said.length, model, digest: digest || null }] : []);
    const text = JSON.stringify({ messages, answered_by }, null, 1);
    adapterhub.save(adapterhub.fileName(adapterhub.title(chat)) + ".json", "application/json", text);
}"""

EXPORT_MARKDOWN = """(chat, system) => {
    const turns = adapterhub.turns(chat ?? []);
    if (!turns.length) return;
    const parts = turns.map(({ turn, model, digest }) => turn.role === "user"
        ? `**You**\\n\\n${turn.content}`
        : `**${model ?? "Corrected"}**${digest ? ` \\`${digest.slice(0, 19)}\\`` : ""}\\n\\n${turn.content}`);
    const head = [`# ${adapterhub.title(chat)}`, ...(system?.trim() ? [`> ${system.trim()}`] : [])];
    const text = [...head, ...parts].join("\\n\\n") + "\\n";
    adapterhub.save(adapterhub.fileName(adapterhub.title(chat)) + ".md", "text/markdown", text);
}"""

SAVE_FILE = "(name, type, text) => { if (text) adapterhub.save(name, type, text); }"

OPEN_IF_WIDE = '() => ({ __type__: "update", open: innerWidth > 700 })'

KEEP_IN_ADDRESS = """(name) => {
    const address = new URL(location);
    address.searchParams.set("adapter", name);
    history.replaceState(null, "", address);
}"""
