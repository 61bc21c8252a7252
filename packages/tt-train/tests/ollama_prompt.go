// The prompt that Ollama makes of a conversation by a Modelfile's TEMPLATE, with Go's own text/template: the oracle of
// tt_train.go_template. Written from the documented behaviour.
// usage: go run ollama_prompt.go TEMPLATE_FILE MESSAGES.json
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type message struct{ Role, Content string }

// until keeps the nodes before and with the first {{ .Response }}; it says whether there was one.
func until(list *parse.ListNode) bool {
	if list == nil {
		return false
	}
	for i, node := range list.Nodes {
		cut := false
		switch n := node.(type) {
		case *parse.ActionNode:
			cut = strings.Contains(n.Pipe.String(), ".Response")
		case *parse.IfNode:
			if cut = until(n.List); cut {
				n.ElseList = nil
			} else {
				cut = until(n.ElseList)
			}
		case *parse.RangeNode:
			cut = until(n.List)
		}
		if cut {
			list.Nodes = list.Nodes[:i+1]
			return true
		}
	}
	return false
}

func main() {
	text, _ := os.ReadFile(os.Args[1])
	raw, _ := os.ReadFile(os.Args[2])
	var messages []*message
	if err := json.Unmarshal(raw, &messages); err != nil {
		panic(err)
	}
	whole := template.Must(template.New("").Option("missingkey=zero").Parse(string(text)))
	var out bytes.Buffer
	run := func(t *template.Template, data map[string]any) {
		if err := t.Execute(&out, data); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
	}
	if strings.Contains(whole.Tree.Root.String(), ".Messages") {
		var system []string
		var joined []*message
		for _, m := range messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
			if n := len(joined); n > 0 && joined[n-1].Role == m.Role {
				joined[n-1].Content += "\n\n" + m.Content
			} else {
				joined = append(joined, m)
			}
		}
		run(whole, map[string]any{"System": strings.Join(system, "\n\n"), "Messages": joined, "Response": ""})
		fmt.Print(out.String())
		return
	}
	var system, prompt, response string
	turn := func(t *template.Template) {
		run(t, map[string]any{"System": system, "Prompt": prompt, "Response": response})
		system, prompt, response = "", "", ""
	}
	for _, m := range messages {
		switch m.Role {
		case "system":
			if prompt != "" || response != "" {
				turn(whole)
			}
			system = m.Content
		case "user":
			if response != "" {
				turn(whole)
			}
			prompt = m.Content
		case "assistant":
			response = m.Content
		}
	}
	root := whole.Tree.Root.CopyList()
	until(root)
	turn(template.Must(template.New("").AddParseTree("", &parse.Tree{Root: root})))
	fmt.Print(out.String())
}
